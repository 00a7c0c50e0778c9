"""MuJoCo's import, which fails where the environment asks for an OpenGL that is not there: a line that says so."""

from rsd.checks import told
from rsd.sim.rendering import gl_backend
from rsd.types import RsdError

try:
    import mujoco as mujoco
except (ImportError, RuntimeError, ValueError, AttributeError, OSError) as error:
    gl_backend()  # knows what is wrong with the environment's values
    remedy = "unset MUJOCO_GL, MUJOCO_EGL_DEVICE_ID and PYOPENGL_PLATFORM"
    raise RsdError(f"MuJoCo cannot be imported ({told(error, 200)}); {remedy}") from error

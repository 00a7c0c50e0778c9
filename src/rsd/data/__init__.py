from rsd.extras import extra

with extra("train"):
    import h5py as h5py

from studies.command import main

main("openvla")

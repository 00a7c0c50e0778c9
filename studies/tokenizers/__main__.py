from studies.command import main

main("tokenizers")

"""`python -m bertemd_deploy`: the same as the console script `bertemd`."""

from bertemd_deploy.cli import main

main()

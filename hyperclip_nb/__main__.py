"`python -m hyperclip_nb` is the command `hyperclip`."
from hyperclip_nb.command.cli import command

if __name__ == '__main__':
    command()

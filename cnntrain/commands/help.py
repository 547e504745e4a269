"""Print the reference of config keys: of an option (data=image_folder), a group (data) or a key (optimizer.lr).

`cnntrain help optimizer.lr` prints the default and the meaning of the key in each option that has it, and
`cnntrain help COMMAND` the help of a command. The texts are the comments in the YAML files of the config.
"""

from cnntrain.config.command_line import Invocation
from cnntrain.config.reference import describe


def run(invocation: Invocation) -> int:
    texts = [describe(word, invocation.config_dir) for word in (*invocation.words, *invocation.overrides)]
    print("\n\n".join(texts))
    return 0

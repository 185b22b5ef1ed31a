"""From a file of options or a few flags to a trained adapter: `hf-qlora-fsdp train`.

command            what is run; conditions: what it needs
arguments          what can be written; command_line: TRL's parser for it, and its YAML; ranges: which numbers
data               files, folders and the Hub, one data set or a mixture; with alpaca and sharegpt
progress, curves   how a run is going, and how it went
"""

"""The real trainer on the real shapes with random weights, from `config.json` alone: `hf-qlora-fsdp rehearse`.

command            starts the ranks, and tells what came of them
workers            what each rank does
memory_cap         a large card that behaves like a smaller one
shortage           out of memory, as an answer
report, plot       a table, JSON, and memory over time as a picture
"""

"""Will a run work on this machine, and if not, what is to be done: `hf-qlora-fsdp doctor`.

command            the examination as a table or JSON, and an exit code
examination        asks, in a process that may die of the answer
*_checks           software, kernels, environment, GPUs, host
live_test          two processes, one sharded step, compared with one process
findings           what is found: level, what, why, fix
"""

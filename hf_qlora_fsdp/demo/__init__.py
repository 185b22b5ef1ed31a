"""A real model learns a countable task while you watch: `hf-qlora-fsdp demo`.

orders             the task: free text into JSON, and a score
model              where the model comes from
command            the run
"""

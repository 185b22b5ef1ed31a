"""Checkpoints that can be trusted, and runs that go on from them.

resumable          the part of the trainer that saves and resumes
checkpoints        folders that are whole or not there
continuity         what a checkpoint may be continued with
random_states      the states of all generators, as tensors
watch              signals, and numbers that are none
"""

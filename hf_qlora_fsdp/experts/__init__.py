"""Mixtures of experts in 4 bits.

stacks             the packed weights of many experts as one buffer
grouping           rows and the experts they belong to: the products
lora               LoRA on experts, as PEFT means it
layers             `Experts4bit`, which takes the place of a model's layer of experts
"""

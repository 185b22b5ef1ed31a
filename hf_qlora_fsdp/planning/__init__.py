"""Will it fit, with which settings, and how fast? Arithmetic alone: no weight is read and no device is touched.

planner            the two questions, `estimate_memory` and `plan`
model_config       `config.json`, held to what a plan needs of it
weighing           every parameter of every unit, from it
layer_trial        what a decoder layer takes while it computes; stand_ins: in the place of what runs on cards alone
machine, cards     what there is: cards, links and hosts
settings           how the run is set up, and what goes together
memory_model       a card, moment by moment; memory_estimate: card, host and disk together
time_model         what a step takes at least, on one of the cards of cards
search             the fastest settings that fit, or what would have to change
report, plot, files    a plan as a table, as bars, and as a script or YAML file
auto, command      `auto_plan=True`, and `hf-qlora-fsdp plan`
"""

"""What the benches wrote, each with the machine and the versions; docs/log.md says when and why.

cpu_speed.json           products, a ranker and MiniLM in INT8, against other engines, on a CPU with AVX-512 and VNNI
cpu_speed_amx.json       the same with AMX
emulation.json           what an emulated pass costs
end_to_end.json          searched maps, deployed
false_certificates.json  how often a certificate is false
loading.json             memory to load a deployed model
prediction.json          the joint drop of random maps, predicted and measured
ranking.json             what low precision does to real rankers
reading.json             how fast logs are read
regret.json              what a search misses of the best map
search_cost.json         what a search costs
served_amx.json          one map on every engine that it is exported to, on a CPU with AMX
siblings.json            layers that share a quantised input, on a CPU with AVX-512 and VNNI
siblings_amx.json        the same with AMX, eager and compiled
zoo.json                 200 models of other people, deployed
"""

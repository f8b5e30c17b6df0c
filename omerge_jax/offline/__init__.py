"""One-shot merges of parameter trees after training: the baseline of online merging.

With δᵢ = θᵢ − θ_b, F the method's sparsifier and n the number of models:

==================== =============================================== ========= =========
method               result                                          normalize rescale
==================== =============================================== ========= =========
``linear``           Σ wᵢ·θᵢ                                         True      —
``task_arithmetic``  θ_b + scale · Σ wᵢ·δᵢ                           False     —
``ties``             F: largest ``density`` share; sign election     True      ``"none"``
``dare_linear``      F: random ``density`` share                     False     ``"norm"``
``dare_ties``        F: random ``density`` share; sign election      False     ``"norm"``
``della_linear``     F: random, likelier for large entries           False     ``"norm"``
``della``            F: random, likelier for large entries; election True      ``"norm"``
``breadcrumbs``      F: ``density`` share below the outliers         False     ``"none"``
``breadcrumbs_ties`` F: ``density`` share below outliers; election   False     ``"none"``
``slerp``            great circle from θ_b to the one model          —         —
==================== =============================================== ========= =========

where F gives θ_b + scale · Σ wᵢ·F(δᵢ), and an election lets only those terms into the sum that have
the elected sign, entry by entry. The defaults are mergekit's; `MergeSettings` has the settings.

Leaves that are one array at several paths of ``base``, and of every model (tied embeddings), are merged
once, under the first of the paths, and stay one array. Inside ``jax.jit`` two arguments are never one
array: there, methods that draw masks give tied leaves one mask each.

The merge is not compiled as a whole; ``jax.jit`` saves memory on large trees. Sharded arrays stay where
they are; only the sort of the ``della`` methods gathers rows that lie on several devices.

References: Wortsman et al., Model Soups, https://arxiv.org/abs/2203.05482; Ilharco et al., Editing
Models with Task Arithmetic, https://arxiv.org/abs/2212.04089; Yadav et al., TIES-Merging,
https://arxiv.org/abs/2306.01708; Yu et al. (DARE), https://arxiv.org/abs/2311.03099; Deep et al.
(DELLA), https://arxiv.org/abs/2406.11617; Davari and Belilovsky, Model Breadcrumbs,
https://arxiv.org/abs/2312.06795; Goddard et al., mergekit, https://arxiv.org/abs/2403.13257.
"""

from omerge_jax.offline.merge import offline_merge
from omerge_jax.offline.methods import MergeSettings

__all__ = ["MergeSettings", "offline_merge"]

"""Accuracy against cost: arms x seeds x budgets through the real trainer, judged at equal counted cost.

Nothing here imports vitfreeze, but for its version. A cell is what a user would type: `vitfreeze pretrain`,
`finetune`, `linear` and `knn`, with `vitfreeze plan --json` for what it costs.
"""

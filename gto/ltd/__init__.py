"""Learning to Draft (arXiv 2603.01639): how deep to draft and how many nodes to verify, decided anew in every cycle."""

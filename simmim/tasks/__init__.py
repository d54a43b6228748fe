"""What is learnt: LightningModules, a page each."""

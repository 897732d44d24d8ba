"""What the proofs of the commit protocol share: a gc written by the format's rules, hooks on a store, and an oracle."""

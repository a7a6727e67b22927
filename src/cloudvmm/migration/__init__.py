"""The form of a VM on the way between two VMMs: addresses, rules, messages and the link that carries them."""

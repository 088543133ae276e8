"""An endpoint on this machine that speaks OpenAI's chat protocol: a base, and its adapters by name."""

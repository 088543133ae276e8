"""A reward for E2E: the share of a restaurant's attributes that an answer mentions."""

import re


def coverage(prompts, completions, **kwargs):
    """Return for each answer the share of its attributes' values that it mentions; none for a copy of the prompt."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        text = completion[-1]["content"].lower()
        attributes = re.findall(r"(\w[\w ]*)\[(.*?)\]", prompt[-1]["content"])
        said = [
            any(word in text for word in ("famil", "child", "kid"))
            if name == "familyFriendly"
            else value.lower() in text
            for name, value in attributes
        ]
        rewards.append(0.0 if "[" in text or not attributes else sum(said) / len(said))
    return rewards

"""Methods × seeds on the same data, model and policy steps: `lit-bilevel compare`, and what it is made of."""

"""What a person does with the methods: recipes, data, training, generation. Only this room imports trl and datasets."""

"""Once it is in place, a trained adapter stays, whatever fails afterwards."""

import pytest
from rich.console import Console
from safetensors.torch import load_file

from inlay.recipe.recipe import Recipe
from inlay.training.train import train

SILENT = Console(quiet=True)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("no font")])
@pytest.mark.parametrize("step", ["draw_change_plots", "run_page"])
def test_what_fails_after_the_adapter_leaves_it(step, error, tiny, records, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(f"inlay.training.run_files.{step}", fail)
    recipe = Recipe(
        model=tiny, data=records, output=str(tmp_path / "run"), steps=1, eval_size=4, samples=0, save_every=0
    )
    with pytest.raises(ValueError, match="run/adapter is trained and saved; its plots or its report could not be"):
        train(recipe, SILENT)
    assert load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")


def test_a_dollar_in_the_name_of_a_model_is_a_dollar_in_its_plots(tiny, records, tmp_path, painted):
    (tmp_path / "a$b_{$").symlink_to(tiny, target_is_directory=True)
    recipe = Recipe(
        model=str(tmp_path / "a$b_{$"), data=records, output=str(tmp_path / "run"), steps=1, eval_size=4, samples=0
    )
    with painted():
        train(recipe, SILENT)
    assert (tmp_path / "run" / "report.html").exists()

"""The ``mdt`` commands: extracting, showing, checking, measuring, reviewing and comparing trees, and preparing rows to train on."""

import typer

from gatewise_mdt.commands import agree, carry, check, evaluate, extract, passages, pathway, prepare, review, show

mdt_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@mdt_app.callback()
def mdt() -> None:
    """Medical decision trees from guideline text. Every tree needs review by a clinician.

    \b
    Example:
      gatewise mdt show sample:guidelines --record 1
    """


for command in (
    show.show,
    passages.passages,
    extract.extract,
    prepare.prepare,
    evaluate.evaluate,
    check.check,
    review.review,
    pathway.pathway,
    agree.agree,
    carry.carry,
):
    mdt_app.command()(command)

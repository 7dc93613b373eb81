"""The HTML page of a report: `Report.save("report.html")`.

    items.py     what can be selected: linears, other products by module, weights that no graph contains
    tree.py      the modules of a model, from dotted names
    lines.py     which lines of the graphs' sources belong to which item
    picture.py   the data flow of one linear, as boxes and arrows
    render.py    the page
    templates/, static/    its HTML, and the styles and scripts that are put into it

Everything that a report says is in the HTML; scripts only search, fold, select and show sources, which are packed into the page.
"""

from quartet_compile.page.render import render

__all__ = ["render"]

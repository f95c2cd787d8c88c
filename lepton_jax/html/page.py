"""What every page has: its head, its style, and templates that refuse a name they don't know.

    render(BODY, title="...", rows=rows, plot=Markup(svg))

Values are escaped unless they are `Markup`.
"""

from typing import Any

import jinja2
from markupsafe import Markup

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111827; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; background: #fff }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; margin: .5rem 0 } th { font-weight: 600 }
td, th { padding: .15rem .9rem .15rem 0; text-align: right; border-bottom: 1px solid #e5e7eb }
td:first-child, th:first-child { text-align: left }
svg { width: 100%; max-width: 46rem; display: block; margin: 1rem 0 }
code, pre { font-size: .85rem; overflow-wrap: anywhere; white-space: pre-wrap }
.digest { background: #f3f4f6; padding: .7rem 1rem; border-radius: .4rem }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width"><style>{{ style }}</style></head><body>
{{ body }}
</body></html>
"""
_ENVIRONMENT = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)


def render(body: str, *, title: str, **values: Any) -> str:
    """A page of a body's jinja2 template; the template sees `title` and `values`."""
    filled = _ENVIRONMENT.from_string(body).render(title=title, **values)
    page = _ENVIRONMENT.from_string(_PAGE)
    return page.render(title=title, style=Markup(_STYLE), body=Markup(filled))

"""The figures of the page, one file each: what is drawn, as a plotly figure; its theme is the page's."""

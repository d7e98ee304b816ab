from uvit.weights.report import Report, shorten


def test_lines_have_their_heads_in_order() -> None:
    report = Report()
    report.dropped.append("c")
    report.read += ["a", "b"]
    assert report.lines() == ["read: a", "read: b", "dropped: c"]
    assert str(report) == "read: a\nread: b\ndropped: c"


def test_some() -> None:
    assert shorten(["a"]) == "a"
    assert shorten(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"

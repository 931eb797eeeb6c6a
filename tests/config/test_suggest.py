from mmtrain.config.suggest import nearest


def test_the_most_alike_name_is_suggested():
    assert nearest("hiden_size", ["head_dim", "hidden_size", "num_heads"]) == " (did you mean hidden_size?)"


def test_nothing_is_suggested_when_nothing_is_alike():
    assert nearest("xyz", ["head_dim", "hidden_size"]) == ""
    assert nearest("xyz", []) == ""

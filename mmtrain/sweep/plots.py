def draw(sweep, trials, folder):
    return []

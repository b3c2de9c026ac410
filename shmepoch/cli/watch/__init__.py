"""`shmepoch watch`: a live view of epochs in a terminal.

`epochs` and `page` say what is on the screens, `widgets` and `screens` put it there.
"""

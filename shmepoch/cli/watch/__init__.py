"""`shmepoch watch`: a live view of epochs in a terminal.

`epochs` and `page` compute the text of the screens; `widgets` and `screens` show it.
"""

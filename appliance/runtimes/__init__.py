"""How container runtimes reach the appliance. All of them end in `Supervisor.attach` and `Supervisor.detach`.

| module | for |
|---|---|
| ``cni``, ``local`` | runtimes that speak CNI: a program of its own, of the standard library alone, to start fast |
| ``docker`` | the network driver for Docker, in the supervisor |
| ``told`` | what a runtime has to be told about an attachment |
"""

"""The cluster service manager: who gets which subnet and address, what runs where, and who has to hear of it.

| module | what it is |
|---|---|
| `decide`, `services` | decisions: pure functions of state and request |
| `requests`, `answers`, `topics`, `descriptor` | what comes in, what goes out |
| `documents`, `state`, `addresses` | what is stored, its mirror with indexes, the address plan |
| `store`, `executor` | transactions, and decisions carried out by them |
| `exposing` | which nodes have ports for which services |
| `leaving` | instances that drain before they are removed |
| `listing` | the list of all nodes, kept true |
| `inbox`, `outbox`, `broker`, `rest` | the edges: messages in and out, the embedded server, HTTP |
| `manager`, `settings`, `cli`, `client` | all put together, and the commands |

docs/cluster.md says what it does and how it works.
"""

"""The service simulator: a cluster under load as discrete events, with the policies that peers and
clients really run. See README.md of this folder; the door is `hexswarm simulate`."""

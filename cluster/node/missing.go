package node

import (
	"slices"
	"strings"

	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
)

// maxNamedDisks bounds the disks that a log line names.
const maxNamedDisks = 4

// given counts the groups of which the metadata store gives this node a replica
// that was made once, and those of them that have none on its usable disks: the
// disk was not mounted, is another, is empty, or has failed.
func (o *orders) given() (given, missing int) {
	for _, id := range sortedKeys(o.groups) {
		mine, here := o.here(id)
		if mine {
			given++
		}
		if mine && !here {
			missing++
		}
	}
	return given, missing
}

func (o *orders) here(id block.GroupID) (mine, here bool) {
	n, g := o.node, o.groups[id]
	for _, r := range g.Replicas {
		if r.Node != n.cfg.ID || !r.Created && !r.Dead() {
			continue
		}
		mine = true
		if rep := n.held(seglog.ReplicaKey{Group: id, Replica: r.Replica}); rep != nil && rep.disk.failed == nil {
			here = true
		}
	}
	return mine, here
}

// synced tells the log of replicas that are not here, once each time there are
// more of them.
func (o *orders) synced() {
	if !o.node.register.done {
		return // it may be another process that is this node
	}
	given, missing := o.given()
	switch {
	case missing > o.told:
		o.node.logf("%d of %d replicas that the cluster gives node %d are not on its disks%s: check --disk and what is mounted there, and start the node again with the right disks, BEFORE another node is stopped. "+
			"A disk that stays away is replaced by copies of the other replicas", missing, given, o.node.cfg.ID, o.absentDisks())
	case missing == 0 && o.told > 0:
		o.node.logf("all %d replicas that the cluster gives node %d are on its disks again", given, o.node.cfg.ID)
	}
	o.told = missing
}

// absentDisks names the disks that the node should have, and came up without.
func (o *orders) absentDisks() string {
	var names []string
	for _, id := range sortedKeys(o.groups) {
		for _, r := range o.groups[id].Replicas {
			if name := r.Disk.String(); r.Node == o.node.cfg.ID && o.node.diskOf(r.Disk) == nil && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	switch {
	case len(names) == 0:
		return ""
	case len(names) > maxNamedDisks:
		names = append(names[:maxNamedDisks], "...")
	}
	return " (it came up without disk " + strings.Join(names, ", ") + ")"
}

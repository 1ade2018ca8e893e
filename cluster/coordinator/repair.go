package coordinator

import (
	"cmp"
	"slices"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/placement"
	"firn.io/firn/internal/block"
)

// membersOf is how many replicas the group counts on.
func membersOf(g meta.GroupMeta) int {
	n := 0
	for _, r := range g.Replicas {
		if !r.Joining {
			n++
		}
	}
	return n
}

// repair orders a new replica for one group that lacks one for good.
func (l *leadership) repair() {
	l.watchAbsent()
	if l.busy {
		return
	}
	groups := make([]meta.GroupMeta, 0, len(l.view.groups))
	for _, g := range l.view.groups {
		if g.Created() && !g.Joining() {
			groups = append(groups, g)
		}
	}
	slices.SortFunc(groups, func(a, b meta.GroupMeta) int { return cmp.Compare(a.ID, b.ID) })
	for _, g := range groups {
		for _, r := range g.Replicas {
			if !l.gone(r) {
				continue
			}
			if at, ok := l.placeFor(g); ok {
				l.replace(g, r, at)
				return
			}
		}
	}
}

// watchAbsent notes since when disks are missing on nodes that are up.
func (l *leadership) watchAbsent() {
	now := l.c.cfg.Loop.Now()
	missing := map[block.DiskID]bool{}
	for id, n := range l.view.nodes {
		for _, d := range n.Disks {
			if d.Absent && l.view.live[id] {
				missing[d.ID] = true
				if _, known := l.absent[d.ID]; !known {
					l.absent[d.ID] = now
					l.c.cfg.Loop.After(l.c.cfg.AbsentAfter, l.schedule)
				}
			}
		}
	}
	for id := range l.absent {
		if !missing[id] {
			delete(l.absent, id)
		}
	}
}

// gone tells whether a replica never comes back: it was not found on its disk,
// the disk failed, or its node is up without that disk for long. A node that is
// down, or slow, is expected back.
func (l *leadership) gone(r meta.ReplicaMeta) bool {
	if r.Lost {
		return true
	}
	for _, d := range l.view.nodes[r.Node].Disks {
		if d.ID == r.Disk {
			since, missing := l.absent[d.ID]
			return d.Failed || missing && l.c.cfg.Loop.Now().Sub(since) >= l.c.cfg.AbsentAfter
		}
	}
	return false
}

// placeFor chooses a disk beside those replicas of the group that are left.
func (l *leadership) placeFor(g meta.GroupMeta) (meta.Place, bool) {
	var others []placement.Disk
	for _, r := range g.Replicas {
		if !l.gone(r) {
			others = append(others, placement.Disk{Node: r.Node, Zone: l.view.nodes[r.Node].Zone, Disk: r.Disk})
		}
	}
	d, ok := placement.PlaceReplica(l.view.disks(l.c.cfg.MaxGroupsPerDisk, true), others)
	return meta.Place{Node: d.Node, Disk: d.Disk}, ok
}

func (l *leadership) replace(g meta.GroupMeta, old meta.ReplicaMeta, at meta.Place) {
	l.c.cfg.Log.Info("coordinator: replaces a replica", "group", g.ID, "replica", old.Replica, "of node", old.Node, "by one on node", at.Node)
	l.step("replace a replica", func() error {
		return meta.ReplaceReplica(l.ctx, l.c.cfg.Store, l.guard, g.ID, g.ConfVersion, old.Replica, at)
	}, func() bool {
		now, still := l.view.groups[g.ID]
		return !still || now.Joining() || now.ConfVersion != g.ConfVersion
	})
}

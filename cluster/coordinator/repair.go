package coordinator

import (
	"cmp"
	"slices"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/placement"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
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

// repair orders a new replica for one group that lacks one for good, or gives
// one such order up.
func (l *leadership) repair() {
	l.watchAbsent()
	l.watchAway()
	if l.busy {
		return
	}
	groups := make([]meta.GroupMeta, 0, len(l.view.groups))
	for _, g := range l.view.groups {
		if g.Created() {
			groups = append(groups, g)
		}
	}
	slices.SortFunc(groups, func(a, b meta.GroupMeta) int { return cmp.Compare(a.ID, b.ID) })
	for _, g := range groups {
		if l.mend(g) {
			return
		}
	}
}

// mend takes the step that is due for one group; false if none is.
func (l *leadership) mend(g meta.GroupMeta) bool {
	if g.Joining() {
		for _, r := range g.Replicas {
			if r.Joining && !r.GivenUp && (l.hopeless(r) || l.needless(g, r)) {
				l.giveUp(g, r)
				return true
			}
		}
		return false
	}
	left := 0
	for _, r := range g.Replicas {
		if !l.gone(r) {
			left++
		}
	}
	if 2*left <= len(g.Replicas) {
		return false // nobody could take a new one in: see firn health
	}
	for _, r := range g.Replicas {
		if !l.gone(r) {
			continue
		}
		if at, ok := l.placeFor(g); ok {
			l.replace(g, r, at)
			return true
		}
	}
	return false
}

// watchAbsent notes since when disks are missing on nodes that are up.
func (l *leadership) watchAbsent() {
	missing := map[block.DiskID]bool{}
	for id, n := range l.view.nodes {
		for _, d := range n.Disks {
			if d.Absent && l.view.live[id] {
				missing[d.ID] = true
			}
		}
	}
	watch(l, l.absent, missing, l.c.cfg.AbsentAfter)
}

// watchAway notes since when nodes are away.
func (l *leadership) watchAway() {
	away := map[block.NodeID]bool{}
	for id := range l.view.nodes {
		if !l.view.live[id] {
			away[id] = true
		}
	}
	watch(l, l.away, away, l.c.cfg.AbsentAfter, l.c.cfg.ReplaceAfter)
}

// watch notes in since what is missing from now on, forgets what is there again,
// and looks for work when something has been missing for so long.
func watch[K comparable](l *leadership, since map[K]clock.Instant, missing map[K]bool, after ...time.Duration) {
	for k := range missing {
		if _, known := since[k]; known {
			continue
		}
		since[k] = l.c.cfg.Loop.Now()
		for _, d := range after {
			if d > 0 {
				l.c.cfg.Loop.After(d, l.schedule)
			}
		}
	}
	for k := range since {
		if !missing[k] {
			delete(since, k)
		}
	}
}

// dead tells whether a replica never comes back: it was not found on its disk, or
// cannot be trusted, the disk failed, or its node is up without that disk for long.
func (l *leadership) dead(r meta.ReplicaMeta) bool {
	if r.Dead() {
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

// gone tells whether a member is to be replaced. One whose node is down, or
// slow, is expected back, for as long as ReplaceAfter says.
func (l *leadership) gone(r meta.ReplicaMeta) bool {
	return l.dead(r) || l.c.cfg.ReplaceAfter > 0 && l.awayFor(r.Node, l.c.cfg.ReplaceAfter)
}

// hopeless tells whether a replica that is no member yet is better made
// elsewhere: it has nothing to come back with.
func (l *leadership) hopeless(r meta.ReplicaMeta) bool {
	return l.dead(r) || l.awayFor(r.Node, l.c.cfg.AbsentAfter)
}

// needless tells whether the member is back that joining was to replace, before
// joining was made; or on its node, where only one of both can open.
func (l *leadership) needless(g meta.GroupMeta, joining meta.ReplicaMeta) bool {
	for _, r := range g.Replicas {
		if r.Leaving && l.back(r) && (!joining.Created || joining.Node == r.Node) {
			return true
		}
	}
	return false
}

func (l *leadership) back(r meta.ReplicaMeta) bool {
	return !r.Dead() && l.view.live[r.Node] && slices.ContainsFunc(l.view.nodes[r.Node].Disks, func(d meta.DiskMeta) bool {
		return d.ID == r.Disk && !d.Failed && !d.Absent
	})
}

func (l *leadership) awayFor(id block.NodeID, d time.Duration) bool {
	since, away := l.away[id]
	return away && l.c.cfg.Loop.Now().Sub(since) >= d
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
	l.c.ordered++
	l.step("replace a replica", func() error {
		return meta.ReplaceReplica(l.ctx, l.c.cfg.Store, l.guard, g.ID, g.ConfVersion, old.Replica, at)
	}, func() bool {
		now, still := l.view.groups[g.ID]
		return !still || now.Joining() || now.ConfVersion != g.ConfVersion
	})
}

func (l *leadership) giveUp(g meta.GroupMeta, joining meta.ReplicaMeta) {
	l.c.cfg.Log.Info("coordinator: gives a replacement up", "group", g.ID, "replica", joining.Replica, "of node", joining.Node)
	l.c.givenUp++
	l.step("give a replacement up", func() error {
		return meta.AbandonReplacement(l.ctx, l.c.cfg.Store, l.guard, g.ID, joining.Replica)
	}, func() bool {
		now, still := l.view.groups[g.ID]
		return !still || !slices.ContainsFunc(now.Replicas, func(r meta.ReplicaMeta) bool {
			return r.Joining && r.Replica == joining.Replica && !r.GivenUp
		})
	})
}

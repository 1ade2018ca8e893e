package node

import (
	"slices"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/raftgroup"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// orders makes the replicas that the metadata store asks this node for, once
// each (C1), and takes away those that are members no more:
//
//  1. A replica that is ordered, not acknowledged and not here is made durable:
//     its state in the index, then its identity in the log.
//  2. Its acknowledgement (Created) is written. Only after that does it open,
//     so that it cannot have voted before the store knows that it exists.
//  3. A replica that is acknowledged and not on its disk is lost: it is marked
//     so and never made again, since it may have voted and forgotten.
//  4. One whose log or state cannot be trusted is marked damaged, if its group
//     has a majority without it, and takes part in nothing any more (L4).
//  5. One that its group's leader found to be a member no more is removed from
//     its disk (see removal).
//
// Of several replicas of one group on this node one has the seat: it may open.
// It gives it up when it is dead or removed (seat).
//
// A replica that the disk holds and that has been open before (its hard state
// or what it applied says so) needs no word from the store to open again: it
// was acknowledged. Replicas that the store does not know are kept (S8).
type orders struct {
	node   *Node
	groups map[block.GroupID]meta.GroupMeta
	busy   map[block.GroupID]bool // an order is being carried out
	// told is how many missing replicas the log has told of.
	told int
}

func newOrders(n *Node) *orders {
	return &orders{node: n, groups: make(map[block.GroupID]meta.GroupMeta), busy: make(map[block.GroupID]bool)}
}

// changed takes a group's value from the mirror of groups.
func (o *orders) changed(kv meta.KV) {
	if !kv.Exists() {
		id, err := meta.ParseGroupKey(kv.Key)
		if err == nil {
			delete(o.groups, id)
		}
		return
	}
	g, err := meta.DecodeGroup(kv)
	if err != nil {
		o.node.logf("%v", err)
		return
	}
	here := func(r meta.ReplicaMeta) bool { return r.Node == o.node.cfg.ID }
	if !slices.ContainsFunc(g.Replicas, here) && !slices.ContainsFunc(g.Removed, here) {
		delete(o.groups, g.ID)
		return
	}
	o.groups[g.ID] = g
	if rep := o.node.replicas[g.ID]; rep != nil {
		rep.disks = nil
	}
	o.follow(g.ID)
}

// again looks at all orders once more: after a disk or the store came back.
func (o *orders) again() {
	for _, id := range sortedKeys(o.groups) {
		o.follow(id)
	}
}

func (o *orders) follow(id block.GroupID) {
	n := o.node
	g, ok := o.groups[id]
	if !ok || o.busy[id] || n.stopping {
		return
	}
	for _, r := range g.Removed {
		if d := n.diskOf(r.Disk); r.Node == n.cfg.ID && d != nil && d.failed == nil && g.Whole() {
			o.remove(d, g, r)
			return // the rest when that is done
		}
	}
	for i := range g.Replicas {
		r := &g.Replicas[i]
		d := n.diskOf(r.Disk)
		if r.Node != n.cfg.ID || d == nil || d.failed != nil {
			continue // elsewhere, or not usable: repair is the coordinator's
		}
		rep := n.held(seglog.ReplicaKey{Group: id, Replica: r.Replica})
		switch {
		case rep == nil && (r.Dead() || r.GivenUp && !r.Created):
		case rep == nil && r.Created:
			o.lose(id, r.Replica, d.id)
		case rep == nil:
			o.create(d, g, r.Replica)
		case r.Dead():
			rep.quarantine()
		case rep.damaged() && o.expendable(g, *r):
			o.condemn(id, rep)
		case !r.Created:
			o.acknowledge(id, r.Replica, d.id)
		case o.seat(rep, g):
			rep.open()
		}
	}
}

// expendable tells whether the group goes on without r.
func (o *orders) expendable(g meta.GroupMeta, r meta.ReplicaMeta) bool {
	well, members := g.Well()
	return r.Joining || 2*(well-1) > members
}

// seat makes rep the replica that may open, of those that this node holds of its
// group. The one that is goes only if it will never count again: a member that
// is well stays, and the order of the other is given up.
func (o *orders) seat(rep *replica, g meta.GroupMeta) bool {
	n := o.node
	was := n.replicas[g.ID]
	if was == nil || was == rep {
		n.sit(rep)
		return true
	}
	same := func(r meta.ReplicaMeta) bool { return r.Replica == was.key.Replica && r.Disk == was.disk.id }
	i := slices.IndexFunc(g.Replicas, same)
	if i >= 0 && g.Replicas[i].Dead() || slices.ContainsFunc(g.Removed, same) {
		n.sit(rep)
		return true
	}
	return false
}

func (o *orders) create(d *disk, g meta.GroupMeta, id block.ReplicaID) {
	conf := raftgroup.NewConf(g.BirthMembers())
	o.busy[g.ID] = true
	d.create(g.ID, id, g.Era, conf.Append(nil), func(rep *replica, err error) {
		delete(o.busy, g.ID)
		if err != nil && block.KindOf(err) == block.Corrupt {
			o.node.logf("%v", err)
			o.lose(g.ID, id, d.id)
			return
		}
		if err != nil {
			o.node.logf("create group %d replica %d: %v", g.ID, id, err)
			return
		}
		o.node.retired[rep.key] = rep // until it has the seat
		o.acknowledge(g.ID, id, d.id)
	})
}

func (o *orders) acknowledge(id block.GroupID, replica block.ReplicaID, disk block.DiskID) {
	n := o.node
	o.tell(id, func() error { return meta.AckReplicaCreated(n.ctx, n.cfg.Meta, id, replica, disk) }, func() {
		rep := n.held(seglog.ReplicaKey{Group: id, Replica: replica})
		if g, ok := o.groups[id]; rep != nil && ok && o.seat(rep, g) {
			rep.open()
		}
	})
}

// condemn records that a replica cannot be trusted.
func (o *orders) condemn(id block.GroupID, rep *replica) {
	n, key, disk := o.node, rep.key, rep.disk.id
	n.logf("group %d replica %d on disk %v is damaged, and will be replaced: %v", id, key.Replica, disk, rep.trouble())
	o.tell(id, func() error { return meta.MarkReplicaDamaged(n.ctx, n.cfg.Meta, id, key.Replica, disk) }, func() {})
}

func (o *orders) lose(id block.GroupID, replica block.ReplicaID, disk block.DiskID) {
	n := o.node
	n.logf("group %d replica %d is not on disk %v any more: it is lost", id, replica, disk)
	o.tell(id, func() error { return meta.MarkReplicaLost(n.ctx, n.cfg.Meta, id, replica, disk) }, func() {})
}

// tell writes something about a group to the metadata store, until it has
// worked or the store says that the order is gone. done runs once it holds it.
func (o *orders) tell(id block.GroupID, write func() error, done func()) {
	n := o.node
	o.busy[id] = true
	var err error
	n.loop.Do(loop.Meta, func() { err = write() }, func() {
		switch {
		case n.stopping:
		case err == nil:
			delete(o.busy, id)
			done()
			// Once more, when the watch has told what was just written: an order
			// that came meanwhile was passed by.
			n.loop.After(metaRetry, func() { o.follow(id) })
		case block.KindOf(err) == block.NotFound || block.KindOf(err) == block.Invalid:
			delete(o.busy, id)
			n.logf("group %d: %v", id, err)
			n.loop.After(metaRetry, func() { o.follow(id) }) // what the watch has told since
		default:
			n.logf("group %d: %v", id, err)
			n.loop.After(metaRetry, func() {
				delete(o.busy, id)
				o.follow(id)
			})
		}
	})
}

// disksOf returns the disks that hold the replicas of rep's group, as far as
// known: its own at least.
func (o *orders) disksOf(rep *replica) []block.DiskID {
	if g, ok := o.groups[rep.key.Group]; ok {
		if rep.disks == nil {
			for _, r := range g.Replicas {
				if !r.Dead() {
					rep.disks = append(rep.disks, r.Disk)
				}
			}
		}
		return rep.disks
	}
	return []block.DiskID{rep.disk.id}
}

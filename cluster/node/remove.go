package node

import (
	"cmp"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/seglog"
	"firn.io/firn/internal/block"
)

// remove takes away what a replica has left here that is a member of its group
// no more, for good: its log, so that the disk's log can be truncated, then its
// state, so that its blocks become free. Then the metadata store is told, so that
// a crash at any step leads here again.
//
// Never the last copy: the group's leader has found, in members that a majority
// holds, that the replica is none (meta.EndReplacement), and nothing is removed
// before all members are there and well (meta.GroupMeta.Whole). That the store
// does not name a replica proves nothing: it may have been restored (S8).
func (o *orders) remove(d *disk, g meta.GroupMeta, r meta.ReplicaMeta) {
	n, key := o.node, seglog.ReplicaKey{Group: g.ID, Replica: r.Replica}
	if rep := n.held(key); rep != nil {
		if n.replicas[g.ID] == rep {
			rep.retire()
		}
		if rep.opening {
			n.loop.After(n.cfg.Pace.Upkeep, func() { o.follow(g.ID) })
			return
		}
	}
	o.busy[g.ID] = true
	d.remove(key, func(bytes int64, err error) {
		delete(o.busy, g.ID)
		if err != nil {
			return // the disk failed, or is closed
		}
		d.confine(key, "")
		if rep := n.retired[key]; rep != nil {
			delete(n.retired, key)
			n.counters.Removed++
			n.logf("group %d replica %d was replaced, and is removed from disk %v: %d bytes of data", g.ID, r.Replica, d.id, bytes)
		}
		o.tell(g.ID, func() error { return meta.ForgetReplica(n.ctx, n.cfg.Meta, g.ID, r.Replica, d.id) }, func() {})
	})
}

// remove makes the end of a replica durable, as far as the disk holds it: first
// the log's, since a state without a log is not a replica (see create). done is
// called with about how many bytes of data it held.
func (d *disk) remove(key seglog.ReplicaKey, done func(bytes int64, err error)) {
	d.whenIdle(func() {
		if err := cmp.Or(d.failed, d.node.ending()); err != nil {
			done(0, err)
			return
		}
		state := d.index.Replica(key)
		again := func() { d.node.loop.After(d.node.cfg.Pace.Upkeep, func() { d.remove(key, done) }) }
		if state != nil && state.Pending().Busy {
			again()
			return
		}
		d.busy = true
		end := func(bytes int64, err error) {
			d.busy = false
			done(bytes, err)
		}
		d.log.Remove(key, func(err error) {
			if err != nil || state == nil {
				end(0, err)
				return
			}
			bytes := state.DataBytes()
			job := d.index.StartRemove(state)
			if job == nil {
				d.busy = false
				again()
				return
			}
			d.run(job, func(err error) {
				d.busy = false
				if err != nil {
					done(0, err)
					return
				}
				d.flushRemoval(func(err error) { done(bytes, err) })
			})
		})
	})
}

// flushRemoval makes durable what the index removed, however long the file
// system is full meanwhile.
func (d *disk) flushRemoval(done func(error)) {
	d.whenIdle(func() {
		if err := cmp.Or(d.failed, d.node.ending()); err != nil {
			done(err)
			return
		}
		d.busy = true
		d.run(d.index.StartFlush(), func(err error) {
			d.busy = false
			switch {
			case err == nil:
				d.node.counters.Flushes++
				d.log.Poke()
				done(nil)
			case d.failed == nil && noSpace(err):
				d.node.loop.After(d.node.cfg.Pace.Upkeep, func() { d.flushRemoval(done) })
			default:
				done(err)
			}
		})
	})
}

// ending is an error once the node begins to stop.
func (n *Node) ending() error {
	if n.stopping {
		return block.Errorf(block.Canceled, "node %d stops", n.cfg.ID)
	}
	return nil
}

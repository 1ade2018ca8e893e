package node

import (
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// metaRetry is the pause after a call to the metadata store that failed.
const metaRetry = time.Second

// registration keeps what the metadata store says of this node true: that it
// lives, its address, its disks. It runs for each new lease and when a disk
// failed, again and again until it has worked (L8).
type registration struct {
	node    *Node
	lease   meta.LeaseID
	done    bool
	busy    bool
	redo    bool
	problem error // why the last try failed
}

// granted takes a new lease from the session.
func (r *registration) granted(lease meta.LeaseID) {
	r.lease = lease
	r.update()
}

func (r *registration) update() {
	n := r.node
	if r.lease == 0 || n.stopping {
		return
	}
	if r.busy {
		r.redo = true
		return
	}
	r.busy, r.redo = true, false
	reg := meta.Registration{Node: meta.NodeMeta{ID: n.cfg.ID, Addr: n.addr, Zone: n.cfg.Zone}, Incarnation: n.cfg.Incarnation, Boot: n.cfg.Boot}
	for _, d := range n.disks {
		if d.absent {
			continue // the store keeps what it knows of it, as of one that was not brought
		}
		reg.Node.Disks = append(reg.Node.Disks, meta.DiskMeta{ID: d.id, CapacityBytes: d.size(), Failed: d.failed != nil})
	}
	for id := range n.replicas {
		reg.HighestGroup = max(reg.HighestGroup, id)
	}
	for key := range n.retired {
		reg.HighestGroup = max(reg.HighestGroup, key.Group)
	}
	lease := r.lease
	var stands meta.NodeMeta
	var err error
	n.loop.Do(loop.Meta, func() { stands, err = meta.RegisterNode(n.ctx, n.cfg.Meta, reg, lease) }, func() {
		r.busy = false
		if n.stopping {
			return
		}
		if err != nil {
			if r.problem == nil || r.problem.Error() != err.Error() {
				n.logf("register node %d, again until it works: %v", n.cfg.ID, err)
			}
			r.problem = err
			n.loop.After(metaRetry, r.update)
			return
		}
		r.problem, r.done = nil, true
		n.orders.synced()
		for _, dm := range stands.Disks {
			if d := n.diskOf(dm.ID); d != nil && dm.Failed && d.failed == nil {
				d.fail(block.Errorf(block.Unavailable, "the metadata store holds disk %v as failed: replace it", d.id))
			}
		}
		if r.redo || r.lease != lease {
			r.update()
		}
	})
}

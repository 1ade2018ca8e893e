package main

import (
	"context"
	"fmt"
	"slices"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// watermarks explains the fill of a disk.
const watermarks = "fill: garbage is collected first from 75%, writes are slowed from 85%, refused from 90%; reads and trims go on"

func viewDisk(d *clusterpb.Disk) diskView {
	v := diskView{ID: d.Id, CapacityBytes: d.CapacityBytes, Failed: d.Failed, State: d.State, Reason: d.Reason}
	if v.State == "" {
		v.State = "unknown"
		return v
	}
	v.diskFill = &diskFill{RoomBytes: d.RoomBytes, TakenBytes: d.TakenBytes, LiveBytes: d.LiveBytes, LogBytes: d.LogBytes, CorruptReads: d.CorruptReads}
	if d.RoomBytes > 0 {
		v.FillPercent = 100 * float64(d.TakenBytes) / float64(d.RoomBytes)
	}
	return v
}

// wellness is what the nodes say of themselves.
type wellness struct {
	served servedReplicas
	copies map[uint32][]wire.CopyHealth
	// used is what the groups in led hold of the volumes, in bytes.
	used     map[block.VolumeID]int64
	led      map[block.GroupID]bool
	problems []*clusterpb.Problem
}

// addHealth asks the nodes how they are, and adds what they say to their disks.
// One that answers lives, also without a lease: etcd may have been away.
func (s *served) addHealth(ctx context.Context, nodes []*clusterpb.Node) wellness {
	w := wellness{served: newServed(), copies: map[uint32][]wire.CopyHealth{}, used: map[block.VolumeID]int64{}, led: map[block.GroupID]bool{}}
	ids := make([]block.NodeID, len(nodes))
	for i, n := range nodes {
		ids[i] = block.NodeID(n.Id)
	}
	answers, errs := s.askNodes(ctx, ids)
	for i, n := range nodes {
		switch {
		case errs[i] == nil && !n.Alive:
			n.Alive = true
			w.problems = append(w.problems, &clusterpb.Problem{Severity: "warning", What: fmt.Sprintf("node %d answers, and has no lease from etcd", n.Id),
				Remedy: "it registers again by itself within seconds; if it stays so, look at its log and at its way to etcd"})
		case errs[i] != nil && n.Alive:
			w.problems = append(w.problems, &clusterpb.Problem{Severity: "warning", What: errs[i].Error(),
				Remedy: "if it stays so, look at the node's log and at the network between it and this gateway"})
		}
		w.served.alive[ids[i]], w.served.came[ids[i]] = n.Alive, n
		if errs[i] == nil {
			w.take(n, &answers[i])
		}
	}
	return w
}

func (w *wellness) take(n *clusterpb.Node, h *wire.NodeHealth) {
	takeHealth(n, h)
	w.served.tell(block.NodeID(n.Id), h)
	w.copies[n.Id] = h.Copies
	for _, r := range h.Served {
		if r.Leads && len(h.Used) < wire.MaxHealthVolumes {
			w.led[r.Group] = true
		}
	}
	for _, u := range h.Used {
		w.used[u.Volume] += u.Bytes
	}
	w.problems = append(w.problems, healthProblems(n)...)
}

// addUsage adds what volumes use, if all of their groups have told.
func (w *wellness) addUsage(volumes ...*clusterpb.Volume) {
	for _, v := range volumes {
		id, err := block.ParseUUID(v.Id)
		known := err == nil && len(v.Groups) > 0
		for _, g := range v.Groups {
			known = known && w.led[block.GroupID(g)]
		}
		if known {
			used := w.used[block.VolumeID(id)]
			v.UsedBytes = &used
		}
	}
}

// takeHealth adds what a node says of itself to what etcd knows of it.
func takeHealth(n *clusterpb.Node, h *wire.NodeHealth) {
	n.Replicas, n.HaltedReplicas, n.HaltedReason, n.RetiredReplicas = h.Replicas, h.Halted, h.HaltedReason, h.Retired
	n.GivenReplicas, n.MissingReplicas, n.Answered = h.Given, h.Missing, true
	for i := range h.Disks {
		d := &h.Disks[i]
		id := d.Disk.String()
		if d.Disk == (block.DiskID{}) {
			id = "unknown"
		}
		if d.State == wire.DiskFailed && !slices.ContainsFunc(n.Disks, func(to *clusterpb.Disk) bool { return to.Id == id }) {
			// Left out at the node's start: to etcd it is absent.
			n.Disks = append(n.Disks, &clusterpb.Disk{Id: id, Failed: true, State: d.State.String(), Reason: d.Reason})
			continue
		}
		for _, to := range n.Disks {
			if to.Id != id {
				continue
			}
			to.State, to.Reason, to.CorruptReads = d.State.String(), d.Reason, d.Corrupt
			to.RoomBytes, to.TakenBytes, to.LiveBytes, to.LogBytes = d.RoomBytes, d.TakenBytes, d.LiveBytes, d.LogBytes
			to.Failed = to.Failed || d.State == wire.DiskFailed
		}
	}
}

// moreRoom names how a disk gets it.
const moreRoom = "--disk DIR=SIZE of `firn node`, --capacity of `firn up`, a larger file system"

// healthProblems tells of disks that hold up writes or have lost something, and
// of replicas that stand still.
func healthProblems(n *clusterpb.Node) (out []*clusterpb.Problem) {
	problem := func(severity, remedy, what string, args ...any) {
		out = append(out, &clusterpb.Problem{Severity: severity, What: fmt.Sprintf(what, args...), Remedy: remedy})
	}
	for _, d := range n.Disks {
		switch d.State {
		case wire.DiskFull.String():
			problem("error", "trim or delete what is not needed, or give it more room ("+moreRoom+"); writes resume by themselves",
				"disk %s of node %d is %s", d.Id, n.Id, d.Reason)
		case wire.DiskSlow.String(), wire.DiskFilling.String():
			problem("warning", "trim or delete what is not needed, or give it more room ("+moreRoom+")",
				"disk %s of node %d is %s", d.Id, n.Id, d.Reason)
		}
		if d.CorruptReads > 0 {
			problem("error", "other replicas answer in its place; where there is none, those blocks are lost until they are written again. The node's log names them; look at the disk's own diagnosis, and replace it",
				"disk %s of node %d: %d %s failed their checksums since the node was started", d.Id, n.Id, d.CorruptReads, plural(int(d.CorruptReads), "read"))
		}
	}
	if n.MissingReplicas > 0 {
		out = append(out, missingProblem(n))
	}
	if n.HaltedReplicas > 0 {
		problem("error", "the other replicas of its groups go on without it; with a single replica its chunks are not served. The node's log says more",
			"node %d: %d of %d replicas take no part: %s", n.Id, n.HaltedReplicas, n.Replicas, n.HaltedReason)
	}
	if n.RetiredReplicas > 0 {
		out = append(out, retiredProblem(n))
	}
	return out
}

package main

import (
	"context"
	"fmt"
	"sync"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// watermarks explains the fill of a disk.
const watermarks = "fill: garbage is collected first from 75%, writes are slowed from 85%, refused from 90%; reads and trims go on"

func viewDisk(d *clusterpb.Disk) diskView {
	v := diskView{ID: d.Id, CapacityBytes: d.CapacityBytes, Failed: d.Failed, State: d.State, Reason: d.Reason, RoomBytes: d.RoomBytes,
		TakenBytes: d.TakenBytes, LiveBytes: d.LiveBytes, LogBytes: d.LogBytes, CorruptReads: d.CorruptReads}
	if v.State == "" {
		v.State = "unknown"
	}
	if d.RoomBytes > 0 {
		v.FillPercent = 100 * float64(d.TakenBytes) / float64(d.RoomBytes)
	}
	return v
}

// addHealth asks the nodes that live how they are, all at once, and adds what
// they say to their disks. It returns what a person should know of it, and the
// replicas that are filled on each node.
func (s *served) addHealth(ctx context.Context, nodes []*clusterpb.Node) (problems []*clusterpb.Problem, copies map[uint32][]wire.CopyHealth) {
	copies = map[uint32][]wire.CopyHealth{}
	answers := make([]wire.NodeHealth, len(nodes))
	errs := make([]error, len(nodes))
	var wait sync.WaitGroup
	for i, n := range nodes {
		if n.Alive {
			wait.Go(func() {
				answers[i], errs[i] = call(ctx, s.loop, func(done func(wire.NodeHealth, error)) {
					s.catalog.client.NodeHealth(ctx, block.NodeID(n.Id), done)
				}, nil)
			})
		}
	}
	wait.Wait()
	for i, n := range nodes {
		switch {
		case !n.Alive:
		case errs[i] != nil:
			problems = append(problems, &clusterpb.Problem{Severity: "warning", What: fmt.Sprintf("node %d does not tell how it is: %v", n.Id, errs[i]),
				Remedy: "if it stays so, look at its log and at the network between it and this gateway"})
		default:
			takeHealth(n, &answers[i])
			copies[n.Id] = answers[i].Copies
			problems = append(problems, healthProblems(n)...)
		}
	}
	return problems, copies
}

// takeHealth adds what a node says of itself to what etcd knows of it.
func takeHealth(n *clusterpb.Node, h *wire.NodeHealth) {
	n.Replicas, n.HaltedReplicas, n.HaltedReason, n.RetiredReplicas = h.Replicas, h.Halted, h.HaltedReason, h.Retired
	for i := range h.Disks {
		d := &h.Disks[i]
		for _, to := range n.Disks {
			if to.Id != d.Disk.String() {
				continue
			}
			to.State, to.Reason, to.CorruptReads = d.State.String(), d.Reason, d.Corrupt
			to.RoomBytes, to.TakenBytes, to.LiveBytes, to.LogBytes = d.RoomBytes, d.TakenBytes, d.LiveBytes, d.LogBytes
			to.Failed = to.Failed || d.State == wire.DiskFailed
		}
	}
}

// healthProblems tells of disks that hold up writes or have lost something, and
// of replicas that stand still.
func healthProblems(n *clusterpb.Node) (out []*clusterpb.Problem) {
	problem := func(severity, remedy, what string, args ...any) {
		out = append(out, &clusterpb.Problem{Severity: severity, What: fmt.Sprintf(what, args...), Remedy: remedy})
	}
	for _, d := range n.Disks {
		switch d.State {
		case wire.DiskFull.String():
			problem("error", "trim or delete what is not needed, or give it more room (--capacity, a larger file system); writes resume by themselves",
				"disk %s of node %d is %s", d.Id, n.Id, d.Reason)
		case wire.DiskSlow.String(), wire.DiskFilling.String():
			problem("warning", "trim or delete what is not needed, or give it more room (--capacity, a larger file system)",
				"disk %s of node %d is %s", d.Id, n.Id, d.Reason)
		}
		if d.CorruptReads > 0 {
			problem("error", "other replicas answer in its place; where there is none, those blocks are lost until they are written again. The node's log names them; look at the disk's own diagnosis, and replace it",
				"disk %s of node %d: %d %s failed their checksums since the node was started", d.Id, n.Id, d.CorruptReads, plural(int(d.CorruptReads), "read"))
		}
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

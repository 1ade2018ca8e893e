package main

import (
	"fmt"
	"io"
	"slices"
	"time"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// The states of a repair.
const (
	repairOrdered = "ordered"  // its node has not made it yet
	repairJoining = "joining"  // it waits for its turn to be copied, or for the end of the log
	repairWaiting = "waiting"  // for its turn to be copied
	repairCopying = "copying"  // from another replica's state
	repairGivenUp = "given up" // the new replica is lost; the group drops it
)

type repairView struct {
	Group        uint64 `json:"group"`
	Replica      uint64 `json:"replica"`
	Node         uint32 `json:"node"`
	Replaces     uint64 `json:"replaces"` // 0: nothing, it was behind the log
	ReplacesNode uint32 `json:"replaces_node"`
	State        string `json:"state"`
	FromNode     uint32 `json:"from_node"`
	DoneChunks   uint32 `json:"done_chunks"`
	TotalChunks  uint32 `json:"total_chunks"` // 0: not known yet
	Bytes        int64  `json:"bytes"`
	TotalBytes   int64  `json:"total_bytes"`
	LeftSeconds  uint32 `json:"left_seconds"` // 0: not known yet
}

// repairsOf are the replicas that are being made or filled: what etcd knows of
// orders, and what nodes say of copies.
func repairsOf(groups []meta.GroupMeta, copies map[uint32][]wire.CopyHealth) (out []*clusterpb.Repair) {
	type key struct {
		group   uint64
		replica uint64
	}
	known := map[key]*clusterpb.Repair{}
	for _, g := range groups {
		var left meta.ReplicaMeta
		for _, r := range g.Replicas {
			if r.Leaving {
				left = r
			}
		}
		for _, r := range g.Replicas {
			if !r.Joining {
				continue
			}
			v := &clusterpb.Repair{Group: uint64(g.ID), Replica: uint64(r.Replica), Node: uint32(r.Node), Replaces: uint64(left.Replica), ReplacesNode: uint32(left.Node)}
			switch {
			case r.GivenUp:
				v.State = repairGivenUp
			case r.Created:
				v.State = repairJoining
			default:
				v.State = repairOrdered
			}
			known[key{v.Group, v.Replica}] = v
			out = append(out, v)
		}
	}
	for _, g := range groups { // in the order of groups
		for _, r := range g.Replicas {
			for _, c := range copies[uint32(r.Node)] {
				if c.Group != g.ID || c.Replica != r.Replica {
					continue
				}
				v := known[key{uint64(c.Group), uint64(c.Replica)}]
				if v == nil {
					v = &clusterpb.Repair{Group: uint64(c.Group), Replica: uint64(c.Replica), Node: uint32(r.Node)}
					out = append(out, v)
				}
				takeCopy(v, &c)
			}
		}
	}
	return out
}

func takeCopy(v *clusterpb.Repair, c *wire.CopyHealth) {
	if v.State == repairGivenUp {
		return
	}
	v.State = repairWaiting
	if c.From != 0 {
		v.State = repairCopying
	}
	v.FromNode, v.DoneChunks, v.TotalChunks = uint32(c.From), c.Done, c.Total
	v.Bytes, v.TotalBytes, v.LeftSeconds = c.Bytes, c.TotalBytes, c.LeftSeconds
}

func viewRepairs(rs []*clusterpb.Repair) []repairView {
	out := make([]repairView, 0, len(rs))
	for _, r := range rs {
		out = append(out, repairView{Group: r.Group, Replica: r.Replica, Node: r.Node, Replaces: r.Replaces, ReplacesNode: r.ReplacesNode, State: r.State,
			FromNode: r.FromNode, DoneChunks: r.DoneChunks, TotalChunks: r.TotalChunks, Bytes: r.Bytes, TotalBytes: r.TotalBytes, LeftSeconds: r.LeftSeconds})
	}
	return out
}

// maxRepairLines bounds what a person is shown: a node has hundreds of replicas.
const maxRepairLines = 20

// writeRepairs lists replicas that are being made, those first that are copied.
func writeRepairs(w io.Writer, rs []repairView) {
	fmt.Fprintln(w, "REPAIR OF\tON NODE\tIN PLACE OF\tSTATE\tDONE\tDATA\tLEFT")
	lines := 0
	for _, copying := range []bool{true, false} {
		for _, r := range rs {
			if (r.State == repairCopying) != copying {
				continue
			}
			if lines++; lines > maxRepairLines {
				continue
			}
			state, done, data, left := r.State, "-", "-", "-"
			if r.FromNode != 0 {
				state = fmt.Sprintf("%s from node %d", r.State, r.FromNode)
			}
			if r.TotalChunks > 0 {
				done = fmt.Sprintf("%.0f%%", 100*float64(r.DoneChunks)/float64(r.TotalChunks))
				data = fmt.Sprintf("%s of %s", formatSize(r.Bytes), formatSize(r.TotalBytes))
			}
			if r.LeftSeconds > 0 {
				left = (time.Duration(r.LeftSeconds) * time.Second).String()
			}
			place := "what it had"
			if r.Replaces != 0 {
				place = fmt.Sprintf("replica %d, node %d", r.Replaces, r.ReplacesNode)
			}
			fmt.Fprintf(w, "group %d replica %d\t%d\t%s\t%s\t%s\t%s\t%s\n", r.Group, r.Replica, r.Node, place, state, done, data, left)
		}
	}
	if lines > maxRepairLines {
		fmt.Fprintf(w, "and %d more; --json lists all\n", lines-maxRepairLines)
	}
}

// groupProblems tells of groups that have lost their majority, or some redundancy.
func groupProblems(groups []meta.GroupMeta, nodes []*clusterpb.Node, seen servedReplicas) (out []*clusterpb.Problem) {
	byID := map[uint32]*clusterpb.Node{}
	for _, n := range nodes {
		byID[n.Id] = n
	}
	gone, repairing := 0, 0
	for _, g := range groups {
		if g.Joining() {
			repairing++
			continue
		}
		for _, r := range g.Replicas {
			if n := byID[uint32(r.Node)]; r.Dead() || n != nil && n.Alive && !hasDisk(n, r.Disk) {
				gone++
			}
		}
	}
	out = seen.condition(groups).problems()
	if gone > 0 {
		out = append(out, &clusterpb.Problem{Severity: severityError, What: fmt.Sprintf("%d %s lost, damaged, or on a disk that failed or is not there, and not being replaced yet", gone, pluralIs(gone, "replica")),
			Remedy: "if it stays so for more than a minute: a new replica needs a node that is up, has a disk with room and holds no other replica of the group, and a majority of the others. Check that the right disks are mounted; see docs/repair.md"})
	}
	if repairing > 0 {
		out = append(out, &clusterpb.Problem{Severity: "warning", What: fmt.Sprintf("%d of %d groups are being repaired", repairing, len(groups)),
			Remedy: "nothing: `firn status` shows how far it is"})
	}
	return append(out, zoneProblems(groups, byID)...)
}

// hasDisk tells whether the node came up with a disk that works.
func hasDisk(n *clusterpb.Node, id block.DiskID) bool {
	return slices.ContainsFunc(n.Disks, func(d *clusterpb.Disk) bool { return d.Id == id.String() && !d.Failed })
}

func pluralIs(n int, word string) string {
	if n == 1 {
		return word + " is"
	}
	return word + "s are"
}

// leastZones is in how many zones any number of replicas does without one of them.
const leastZones = 3

// zoneProblems tells of groups whose replicas share a zone, where there are zones.
func zoneProblems(groups []meta.GroupMeta, nodes map[uint32]*clusterpb.Node) []*clusterpb.Problem {
	zones, crowded := map[string]bool{}, 0
	for _, n := range nodes {
		if n.Zone != "" {
			zones[n.Zone] = true
		}
	}
	if len(zones) == 0 {
		return nil
	}
	for _, g := range groups {
		in := map[string]int{}
		members, most := 0, 0
		for _, r := range g.Replicas {
			if n := nodes[uint32(r.Node)]; n != nil && !r.Leaving {
				members++
				in[n.Zone]++
				most = max(most, in[n.Zone])
			}
		}
		if most > 1 && 2*(members-most) <= members {
			crowded++
		}
	}
	if crowded == 0 {
		return nil
	}
	remedy := fmt.Sprintf("there are %d zones, use %d or more: start nodes with another --zone; replicas that are placed from then on use them", len(zones), leastZones)
	if len(zones) >= leastZones {
		remedy = "there are zones enough now; replicas that are placed from now on use them"
	}
	return []*clusterpb.Problem{{Severity: "warning", Remedy: remedy,
		What: fmt.Sprintf("%d of %d groups have so many replicas in one zone that its loss takes their majority", crowded, len(groups))}}
}

// retiredProblem tells of replicas that were replaced.
func retiredProblem(n *clusterpb.Node) *clusterpb.Problem {
	return &clusterpb.Problem{Severity: "warning", What: fmt.Sprintf("node %d holds the data of %d replaced %s", n.Id, n.RetiredReplicas, plural(int(n.RetiredReplicas), "replica")),
		Remedy: "nothing: it is removed once all other replicas of the group are there and well"}
}

// replaceAfterUsage is the help of --replace-after.
const replaceAfterUsage = "replace the replicas of a node that is away for so long, such as 30m; 0: never, it is expected back. The same on all nodes"

// checkReplaceAfter refuses times in which a node merely restarts.
func checkReplaceAfter(d time.Duration) error {
	if d != 0 && d < minReplaceAfter {
		return block.Errorf(block.Invalid, "--replace-after %v: a node that restarts or is slow is not lost; use at least %v, or 0 for never", d, minReplaceAfter)
	}
	return nil
}

const minReplaceAfter = time.Minute

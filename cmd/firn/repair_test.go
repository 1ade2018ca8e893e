package main

import (
	"strings"
	"testing"
	"time"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

func nodesIn(zones ...string) (out []*clusterpb.Node) {
	for i, z := range zones {
		out = append(out, &clusterpb.Node{Id: uint32(i + 1), Zone: z, Alive: true, Disks: []*clusterpb.Disk{{Id: block.DiskID{byte(i + 1)}.String()}}})
	}
	return out
}

func groupOn(id block.GroupID, nodes ...block.NodeID) meta.GroupMeta {
	g := meta.GroupMeta{ID: id}
	for i, n := range nodes {
		g.Replicas = append(g.Replicas, meta.ReplicaMeta{Node: n, Disk: block.DiskID{byte(n)}, Replica: block.ReplicaID(i + 1), Created: true})
	}
	return g
}

func aliveOf(nodes []*clusterpb.Node) servedReplicas {
	seen := newServed()
	for _, n := range nodes {
		seen.alive[block.NodeID(n.Id)], seen.came[block.NodeID(n.Id)] = n.Alive, n
	}
	return seen
}

func TestGroupProblems(t *testing.T) {
	three := nodesIn("", "", "")
	lost, two, joining := groupOn(1, 1, 2, 3), groupOn(1, 1, 2, 3), groupOn(1, 1, 2, 3)
	lost.Replicas[1].Lost = true
	two.Replicas[1].Lost, two.Replicas[2].Damaged = true, true
	swapped, failed := nodesIn("", "", ""), nodesIn("", "", "")
	swapped[2].Disks[0].Id = block.DiskID{9}.String()
	failed[2].Disks[0].Failed = true
	joining.Replicas[1].Damaged, joining.Replicas[1].Leaving = true, true
	joining.Replicas = append(joining.Replicas, meta.ReplicaMeta{Node: 2, Disk: block.DiskID{2}, Replica: 4, Joining: true})
	for _, c := range []struct {
		name     string
		group    meta.GroupMeta
		nodes    []*clusterpb.Node
		severity string
		words    string
	}{
		{"well", groupOn(1, 1, 2, 3), three, "", ""},
		{"lost", lost, three, "error error", "1 replica is lost, damaged, or on a disk"},
		{"on a disk that is not there", groupOn(1, 1, 2, 3), swapped, "error error", "1 replica is lost, damaged, or on a disk"},
		{"on a failed disk", groupOn(1, 1, 2, 3), failed, "error error", "1 replica is lost, damaged, or on a disk"},
		{"a majority lost", two, three, "error error", "no majority"},
		{"being repaired", joining, three, "error warning", "1 of 1 groups are being repaired"},
		{"a zone each", groupOn(1, 1, 2, 3), nodesIn("a", "b", "c"), "", ""},
		{"two zones", groupOn(1, 1, 2, 3), nodesIn("a", "b", "a"), "warning", "in one zone"},
		{"five in three zones", groupOn(1, 1, 2, 3, 4, 5), nodesIn("a", "b", "c", "a", "b"), "", ""},
		{"one replica", groupOn(1, 1), nodesIn("a"), "", ""},
	} {
		var severity []string
		var text strings.Builder
		for _, p := range groupProblems([]meta.GroupMeta{c.group}, c.nodes, aliveOf(c.nodes)) {
			severity = append(severity, p.Severity)
			text.WriteString(p.What + "\n")
			if p.Remedy == "" {
				t.Errorf("%s: %q says not what to do", c.name, p.What)
			}
		}
		if strings.Join(severity, " ") != c.severity || !strings.Contains(text.String(), c.words) {
			t.Errorf("%s: %v: %s", c.name, severity, text.String())
		}
	}
}

// Orders that etcd holds and copies that nodes tell of become one list.
func TestRepairs(t *testing.T) {
	gs := []meta.GroupMeta{groupOn(1, 1, 2, 3), groupOn(2, 1, 2, 3), groupOn(3, 1, 2, 3), groupOn(4, 1, 2, 3)}
	for i := range gs[:3] {
		g := &gs[i]
		g.Replicas[2].Lost, g.Replicas[2].Leaving = true, true
		g.Replicas = append(g.Replicas, meta.ReplicaMeta{Node: 4, Disk: block.DiskID{4}, Replica: 9, Joining: true, Created: i > 0})
	}
	copies := map[uint32][]wire.CopyHealth{
		4: {{Group: 2, Replica: 9, From: 1, Done: 10, Total: 40, Bytes: 1 << 20, TotalBytes: 4 << 20, LeftSeconds: 90}},
		2: {{Group: 4, Replica: 2}},
	}
	views := viewRepairs(repairsOf(gs, copies))
	want := []repairView{
		{Group: 1, Replica: 9, Node: 4, Replaces: 3, ReplacesNode: 3, State: repairOrdered},
		{Group: 2, Replica: 9, Node: 4, Replaces: 3, ReplacesNode: 3, State: repairCopying, FromNode: 1, DoneChunks: 10, TotalChunks: 40,
			Bytes: 1 << 20, TotalBytes: 4 << 20, LeftSeconds: 90},
		{Group: 3, Replica: 9, Node: 4, Replaces: 3, ReplacesNode: 3, State: repairJoining},
		{Group: 4, Replica: 2, Node: 2, State: repairWaiting},
	}
	if len(views) != len(want) {
		t.Fatalf("%+v", views)
	}
	for i := range want {
		if views[i] != want[i] {
			t.Errorf("%+v, want %+v", views[i], want[i])
		}
	}
	var out strings.Builder
	writeRepairs(&out, views)
	lines := strings.Split(out.String(), "\n")
	for _, words := range []string{"group 2 replica 9", "replica 3, node 3", "copying from node 1", "25%", "1M of 4M", "1m30s"} {
		if !strings.Contains(lines[1], words) {
			t.Errorf("%q lacks %q", lines[1], words)
		}
	}
}

func TestReplaceAfter(t *testing.T) {
	for d, ok := range map[time.Duration]bool{0: true, time.Second: false, 59 * time.Second: false, time.Minute: true, 24 * time.Hour: true, -time.Hour: false} {
		if err := checkReplaceAfter(d); (err == nil) != ok {
			t.Errorf("%v: %v", d, err)
		}
	}
}

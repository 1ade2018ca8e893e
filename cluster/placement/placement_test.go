package placement

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"firn.io/firn/internal/block"
)

func drawDisks(t *rapid.T) []Disk {
	nodes := rapid.IntRange(1, 9).Draw(t, "nodes")
	zones := rapid.IntRange(1, 4).Draw(t, "zones")
	var disks []Disk
	for n := range nodes {
		zone := fmt.Sprint("z", rapid.IntRange(0, zones-1).Draw(t, "zone"))
		for d := range rapid.IntRange(1, 3).Draw(t, "disks") {
			disks = append(disks, Disk{
				Node: block.NodeID(n + 1), Zone: zone, Disk: block.DiskID{byte(n), byte(d)},
				CapacityBytes: rapid.Int64Range(0, 1<<44).Draw(t, "capacity"),
				Replicas:      rapid.IntRange(0, 20).Draw(t, "replicas"), Room: rapid.IntRange(0, 5).Draw(t, "room"),
			})
		}
	}
	return disks
}

func TestPlaceGroups(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		disks := drawDisks(t)
		before := slices.Clone(disks)
		replicas := rapid.SampledFrom([]int{1, 3, 5}).Draw(t, "replicas")
		n := rapid.IntRange(0, 12).Draw(t, "groups")
		got := PlaceGroups(disks, replicas, n)
		if !slices.Equal(disks, before) {
			t.Fatal("the input was changed")
		}
		if again := PlaceGroups(disks, replicas, n); fmt.Sprint(again) != fmt.Sprint(got) {
			t.Fatal("the same input, another choice")
		}
		room := map[block.DiskID]int{}
		for _, d := range disks {
			room[d.Disk] = d.Room
		}
		for _, g := range got {
			checkGroup(t, disks, room, g, replicas)
		}
		if len(got) > n {
			t.Fatalf("%d groups of %d", len(got), n)
		}
		if len(got) < n && nodesWithRoom(disks, room) >= replicas {
			t.Fatalf("%d groups of %d, though there is room", len(got), n)
		}
	})
}

func nodesWithRoom(disks []Disk, room map[block.DiskID]int) int {
	seen := map[block.NodeID]bool{}
	for _, d := range disks {
		if room[d.Disk] > 0 {
			seen[d.Node] = true
		}
	}
	return len(seen)
}

// checkGroup checks one group against the room that was left before it, and takes it.
func checkGroup(t *rapid.T, disks []Disk, room map[block.DiskID]int, g []Disk, replicas int) {
	zonesWithRoom, used, nodes := map[string]bool{}, map[string]bool{}, map[block.NodeID]bool{}
	for _, d := range disks {
		if room[d.Disk] > 0 {
			zonesWithRoom[d.Zone] = true
		}
	}
	for _, d := range g {
		if nodes[d.Node] {
			t.Fatalf("two replicas on node %d: %+v", d.Node, g)
		}
		nodes[d.Node], used[d.Zone] = true, true
		if room[d.Disk]--; room[d.Disk] < 0 {
			t.Fatalf("disk %v took more than its room", d.Disk)
		}
	}
	if len(g) != replicas {
		t.Fatalf("%d replicas, want %d", len(g), replicas)
	}
	if want := min(replicas, len(zonesWithRoom)); len(used) != want {
		t.Fatalf("%d zones of %d are used: %+v", len(used), want, g)
	}
}

func TestReplicasAreBalanced(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		nodes := rapid.IntRange(3, 12).Draw(t, "nodes")
		big := rapid.IntRange(0, nodes-1).Draw(t, "big")
		var disks []Disk
		for n := range nodes {
			d := Disk{Node: block.NodeID(n + 1), Disk: block.DiskID{byte(n + 1)}, CapacityBytes: 1 << 40, Room: 1000}
			if n == big {
				d.CapacityBytes *= 2
			}
			disks = append(disks, d)
		}
		held := map[block.NodeID]int{}
		const groups = 60
		for _, g := range PlaceGroups(disks, 3, groups) {
			for _, d := range g {
				held[d.Node]++
			}
		}
		unit := float64(3*groups) / float64(nodes+1) // the big one counts twice
		for n := range nodes {
			want := unit
			if n == big {
				want = min(2*unit, groups)
			} else if 2*unit > groups {
				want = float64(2*groups) / float64(nodes-1)
			}
			if got := float64(held[block.NodeID(n+1)]); got < want-2 || got > want+2 {
				t.Fatalf("node %d has %v replicas, its capacity asks for %.1f", n+1, got, want)
			}
		}
	})
}

func TestMoreReplicasThanNodes(t *testing.T) {
	disks := []Disk{{Node: 1, Disk: block.DiskID{1}, CapacityBytes: 1, Room: 9}, {Node: 1, Disk: block.DiskID{2}, CapacityBytes: 1, Room: 9}, {Node: 2, Disk: block.DiskID{3}, CapacityBytes: 1, Room: 9}}
	if got := PlaceGroups(disks, 3, 1); got != nil {
		t.Fatalf("three replicas on two nodes: %+v", got)
	}
	if got := PlaceGroups(nil, 1, 1); got != nil {
		t.Fatalf("a replica on no disk: %+v", got)
	}
}

func TestWidth(t *testing.T) {
	for nodes, want := range map[int]int{0: 4, 1: 4, 2: 4, 3: 6, 10: 20, 16: 32, 100: 32} {
		if got := Width(nodes); got != want {
			t.Errorf("%d nodes: %d groups", nodes, got)
		}
	}
}

func TestPlanSpans(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		limit := rapid.Int64Range(0, 1000).Draw(t, "limit")
		var groups []Group
		for i := range rapid.IntRange(0, 40).Draw(t, "groups") {
			groups = append(groups, Group{ID: block.GroupID(i + 1), LoadBytes: rapid.Int64Range(0, 1500).Draw(t, "load"), LimitBytes: limit})
		}
		shares := rapid.SliceOfN(rapid.Int64Range(1, 400), 0, 12).Draw(t, "shares")
		width := rapid.IntRange(1, 32).Draw(t, "width")
		budget := rapid.IntRange(0, 60).Draw(t, "budget")
		p := PlanSpans(groups, width, shares, limit, budget)
		if p.New > budget || len(p.Spans) != len(shares) {
			t.Fatalf("%d new groups of %d, %d spans of %d", p.New, budget, len(p.Spans), len(shares))
		}
		load := make([]int64, len(groups)+p.New)
		for i, g := range groups {
			load[i] = g.LoadBytes
		}
		for s, span := range p.Spans {
			if len(span) != width && len(span) < len(groups) {
				t.Fatalf("span %d has %d groups of %d, with %d there", s, len(span), width, len(groups))
			}
			sorted := slices.Sorted(slices.Values(span))
			if len(slices.Compact(sorted)) != len(span) {
				t.Fatalf("span %d names a group twice: %v", s, span)
			}
			for _, i := range span {
				if i >= len(load) {
					t.Fatalf("span %d names group %d of %d", s, i, len(load))
				}
				if p.New < budget && load[i] > 0 && load[i]+shares[s] > limit {
					t.Fatalf("span %d overloads a group, with %d of %d new ones", s, p.New, budget)
				}
			}
			for _, i := range span {
				load[i] += shares[s]
			}
		}
	})
}

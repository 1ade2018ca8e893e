package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// Replicas count that nodes say they serve, not nodes that live: one that came up
// with an empty disk makes its groups degraded, two take their majority.
func TestReplicasAreCounted(t *testing.T) {
	groups := []meta.GroupMeta{groupOn(1, 1, 2, 3), groupOn(2, 1, 2, 3), groupOn(3, 1, 2, 3)}
	full := func(missing ...block.NodeID) servedReplicas {
		seen := newServed()
		for id := block.NodeID(1); id <= 3; id++ {
			seen.alive[id] = true
			var h wire.NodeHealth
			for _, g := range groups {
				empty := false
				for _, m := range missing {
					empty = empty || m == id
				}
				if !empty {
					h.Served = append(h.Served, wire.ServedReplica{Group: g.ID, Replica: block.ReplicaID(id), Follows: true})
				}
			}
			seen.tell(id, &h)
		}
		return seen
	}
	for _, c := range []struct {
		name  string
		seen  servedReplicas
		words string
	}{
		{"all there", full(), ""},
		{"one disk empty", full(2), "3 of 3 groups are degraded, 0 have no majority"},
		{"two disks empty", full(2, 3), "3 of 3 groups are degraded, 3 have no majority (groups 1, 2, 3)"},
		{"nobody told", aliveOf(nodesIn("", "", "")), ""},
		{"two nodes down", aliveOf(nodesIn("")), "3 have no majority"},
	} {
		var text, remedies strings.Builder
		for _, p := range c.seen.condition(groups).problems() {
			if p.Severity != severityError {
				t.Errorf("%s: %s", c.name, p.Severity)
			}
			text.WriteString(p.What)
			remedies.WriteString(p.Remedy)
		}
		if c.words == "" && text.Len() > 0 || !strings.Contains(text.String(), c.words) || (remedies.Len() > 0) != (text.Len() > 0) {
			t.Errorf("%s: %q, %q; want %q", c.name, text.String(), remedies.String(), c.words)
		}
	}
	// All there, and no leader yet: new groups, for a moment.
	young := newServed()
	for id := block.NodeID(1); id <= 3; id++ {
		young.alive[id] = true
		young.tell(id, &wire.NodeHealth{Served: []wire.ServedReplica{{Group: 1, Replica: block.ReplicaID(id)}}})
	}
	if c := young.condition(groups[:1]); !c.unsettled {
		t.Error("an election is not asked about again")
	}
	if c := full(2).condition(groups); c.unsettled {
		t.Error("replicas that are missing are taken for an election")
	}
	if ps := young.condition(groups[:1]).problems(); len(ps) != 1 || ps[0].Severity != "warning" || !strings.Contains(ps[0].What, "no leader now") {
		t.Errorf("%v", ps)
	}
	// A replica that was replaced, or votes under another id, does not count.
	seen := full()
	other := groupOn(1, 1, 2, 3)
	other.Replicas[0].Replica = 9
	if c := seen.condition([]meta.GroupMeta{other}); len(c.degraded) != 1 || len(c.stuck) != 0 {
		t.Errorf("%+v", c)
	}
	n := &clusterpb.Node{Id: 2, Alive: true}
	takeHealth(n, &wire.NodeHealth{Given: 6, Missing: 6})
	if ps := healthProblems(n); len(ps) != 1 || ps[0].Severity != severityError || !strings.Contains(ps[0].What, "6 of 6 replicas that the cluster gives it are not on its disks") {
		t.Errorf("%v", ps)
	}
}

// What is not known is left out, and one verdict ends status and health.
func TestStatusView(t *testing.T) {
	volume := func() *clusterpb.Volume {
		used := int64(1 << 20)
		return &clusterpb.Volume{Name: "demo", SizeBytes: 1 << 30, Replicas: 3, State: "ready", AttachedTo: "gw", Groups: []uint64{1}, UsedBytes: &used}
	}
	away := &clusterpb.StatusResponse{Gateway: "gw", Partial: true, Volumes: []*clusterpb.Volume{volume()},
		Problems: []*clusterpb.Problem{{Severity: "error", What: "etcd does not answer", Remedy: "start it"}}}
	well := &clusterpb.StatusResponse{Gateway: "gw", Nodes: []*clusterpb.Node{{Id: 1, Alive: true, Disks: []*clusterpb.Disk{{Id: "d"}}}}, Groups: 1, DegradedGroups: 0,
		Gateways: []*clusterpb.Gateway{{Id: "gw", ApiAddr: "a", NbdAddr: "b"}, {Id: "other-gateway"}}, Volumes: []*clusterpb.Volume{volume()},
		Problems: []*clusterpb.Problem{{Severity: "warning", What: "w", Remedy: "r"}}}
	for _, c := range []struct {
		name            string
		s               *clusterpb.StatusResponse
		has, lacks      []string // of the text
		fields, noField []string // of the JSON
	}{
		{"etcd away", away, []string{"unknown, etcd does not answer", "not healthy: 1 error, 0 warnings"}, []string{"0 of 0 nodes"},
			[]string{`"partial": true`, `"healthy": false`}, []string{`"nodes"`, `"groups"`, `"replicas"`, `"gateways"`, `"used_bytes"`}},
		{"well", well, []string{"other-gateway", "healthy, with 1 warning", "1M"}, []string{"unknown, etcd"},
			[]string{`"partial": false`, `"degraded_groups": 0`, `"used_bytes": 1048576`, `"id": "other-gateway"`}, []string{`"fill_percent"`, `"halted_replicas"`}},
	} {
		v := viewStatus(c.s)
		var text strings.Builder
		v.write(&text)
		data, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		for _, w := range c.has {
			if !strings.Contains(text.String(), w) {
				t.Errorf("%s: no %q in\n%s", c.name, w, text.String())
			}
		}
		for _, w := range c.lacks {
			if strings.Contains(text.String(), w) {
				t.Errorf("%s: %q in\n%s", c.name, w, text.String())
			}
		}
		for _, f := range c.fields {
			if !bytes.Contains(data, []byte(f)) {
				t.Errorf("%s: no %s in\n%s", c.name, f, data)
			}
		}
		for _, f := range c.noField {
			if bytes.Contains(data, []byte(f)) {
				t.Errorf("%s: %s in\n%s", c.name, f, data)
			}
		}
		if last := strings.TrimSpace(text.String()[strings.LastIndex(strings.TrimSpace(text.String()), "\n")+1:]); last != judge(c.s.Problems).verdict() {
			t.Errorf("%s: status ends with %q", c.name, last)
		}
	}
}

// What a volume uses is told if the leaders of all its groups did.
func TestUsage(t *testing.T) {
	id := block.VolumeID{7}
	w := wellness{served: newServed(), copies: map[uint32][]wire.CopyHealth{}, used: map[block.VolumeID]int64{}, led: map[block.GroupID]bool{}}
	say := func(node uint32, g block.GroupID, bytes int64) {
		w.take(&clusterpb.Node{Id: node, Alive: true}, &wire.NodeHealth{
			Served: []wire.ServedReplica{{Group: g, Replica: 1, Follows: true, Leads: true}, {Group: 9, Replica: 2, Follows: true}},
			Used:   []wire.VolumeUsage{{Volume: id, Bytes: bytes}},
		})
	}
	v := &clusterpb.Volume{Id: id.String(), Groups: []uint64{1, 2}}
	say(1, 1, 100)
	if w.addUsage(v); v.UsedBytes != nil {
		t.Errorf("%d bytes are told without a word of group 2", *v.UsedBytes)
	}
	say(2, 2, 20)
	if w.addUsage(v); v.UsedBytes == nil || *v.UsedBytes != 120 {
		t.Errorf("usage %v", v.UsedBytes)
	}
}

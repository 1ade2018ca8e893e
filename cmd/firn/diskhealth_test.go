package main

import (
	"strings"
	"testing"

	"firn.io/firn/cluster/clusterpb"
	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

// What a node says of its disks becomes problems with what to do, errors where
// writes are held up or something is lost.
func TestHealthProblems(t *testing.T) {
	id := block.DiskID{1}
	for _, c := range []struct {
		name     string
		health   wire.NodeHealth
		severity []string
		words    string
	}{
		{"well", wire.NodeHealth{Replicas: 4, Disks: []wire.DiskHealth{{Disk: id, State: wire.DiskOK, RoomBytes: 100, TakenBytes: 10}}}, nil, ""},
		{"filling", wire.NodeHealth{Disks: []wire.DiskHealth{{Disk: id, State: wire.DiskFilling, RoomBytes: 100, TakenBytes: 76, Reason: "76 % full"}}}, []string{"warning"}, "76 %"},
		{"slow", wire.NodeHealth{Disks: []wire.DiskHealth{{Disk: id, State: wire.DiskSlow, RoomBytes: 100, TakenBytes: 86, Reason: "86 % full"}}}, []string{"warning"}, "86 %"},
		{"full", wire.NodeHealth{Disks: []wire.DiskHealth{{Disk: id, State: wire.DiskFull, RoomBytes: 100, TakenBytes: 95, Reason: "95 % full: writes are refused"}}}, []string{"error"}, "refused"},
		{"corrupt", wire.NodeHealth{Disks: []wire.DiskHealth{{Disk: id, State: wire.DiskOK, RoomBytes: 100, Corrupt: 2}}}, []string{"error"}, "2 reads failed their checksums"},
		{"failed", wire.NodeHealth{Disks: []wire.DiskHealth{{Disk: id, State: wire.DiskFailed, Reason: "sync: input/output error"}}}, []string{"error"}, "input/output error"},
		{"left out", wire.NodeHealth{Disks: []wire.DiskHealth{{State: wire.DiskFailed, Reason: "the disk has format 9"}}}, []string{"error"}, "disk unknown of node 1 has failed: the disk has format 9"},
		{"halted", wire.NodeHealth{Replicas: 3, Halted: 1, HaltedReason: "group 7 replica 1: its log is damaged"}, []string{"error"}, "1 of 3 replicas take no part: group 7"},
	} {
		n := &clusterpb.Node{Id: 1, Alive: true, Disks: []*clusterpb.Disk{{Id: id.String(), CapacityBytes: 200}}}
		takeHealth(n, &c.health)
		problems := append(nodeProblems([]*clusterpb.Node{n}), healthProblems(n)...)
		var severity []string
		var text strings.Builder
		for _, p := range problems {
			severity = append(severity, p.Severity)
			text.WriteString(p.What + "\n")
			if p.Remedy == "" {
				t.Errorf("%s: %q says not what to do", c.name, p.What)
			}
		}
		if strings.Join(severity, " ") != strings.Join(c.severity, " ") || !strings.Contains(text.String(), c.words) {
			t.Errorf("%s: %v: %s", c.name, severity, text.String())
		}
		var out strings.Builder
		writeDisks(&out, viewNodes([]*clusterpb.Node{n}))
		if state := viewDisk(n.Disks[0]).State; !strings.Contains(out.String(), state) || !strings.Contains(out.String(), "90%") {
			t.Errorf("%s: %s", c.name, out.String())
		}
	}
}

package wire

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"firn.io/firn/internal/block"
)

func someHealth() NodeHealth {
	return NodeHealth{Replicas: 16, Halted: 1, HaltedReason: "its log is damaged", Disks: []DiskHealth{
		{Disk: block.DiskID{1}, State: DiskFull, RoomBytes: 100, TakenBytes: 91, LiveBytes: 80, LogBytes: 5, Corrupt: 3, Reason: "91 % full"},
		{Disk: block.DiskID{2}, State: DiskOK, RoomBytes: 1 << 40},
	}, Retired: 2, Copies: []CopyHealth{
		{Group: 3, Replica: 5, From: 2, Done: 10, Total: 40, Bytes: 7 << 20, TotalBytes: 28 << 20, LeftSeconds: 12},
		{Group: 4, Replica: 6},
	}, Given: 18, Missing: 2, Served: []ServedReplica{{Group: 3, Replica: 1, Follows: true, Leads: true}, {Group: 9, Replica: 2}},
		Used: []VolumeUsage{{Volume: block.VolumeID{7}, Bytes: 1 << 40}}}
}

func TestHealth(t *testing.T) {
	want := someHealth()
	data := AppendHealth(nil, &want)
	got, err := DecodeHealth(data)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Fatalf("%+v, %v", got, err)
	}
	if p := got.Disks[0].Percent(); p != 91 {
		t.Fatalf("%v %%", p)
	}
	for n := range data {
		if _, err := DecodeHealth(data[:n]); err == nil {
			t.Fatalf("cut at %d of %d is taken", n, len(data))
		}
	}
	// What is too much is left out, and what remains decodes.
	large := NodeHealth{Disks: make([]DiskHealth, 2*MaxHealthDisks), Copies: make([]CopyHealth, 2*MaxHealthCopies),
		Served: make([]ServedReplica, 2*MaxHealthReplicas), Used: make([]VolumeUsage, 2*MaxHealthVolumes)}
	for i := range large.Disks {
		large.Disks[i].Reason = strings.Repeat("x", 2*maxTextBytes)
	}
	data = AppendHealth(nil, &large)
	if got, err := DecodeHealth(data); err != nil || len(got.Disks) != MaxHealthDisks || len(got.Copies) != MaxHealthCopies ||
		len(got.Served) != MaxHealthReplicas || len(got.Used) != MaxHealthVolumes || len(data) > MaxHealthBytes {
		t.Fatalf("%d disks in %d bytes, %v", len(got.Disks), len(data), err)
	}
	resp := Response{ID: 7, Status: StatusOK, Health: AppendHealth(nil, &want)}
	var back Response
	if err := DecodeResponse(AppendResponse(nil, &resp), &back); err != nil || !bytes.Equal(back.Health, resp.Health) {
		t.Fatalf("%+v, %v", back, err)
	}
}

func FuzzDecodeHealth(f *testing.F) {
	h := someHealth()
	f.Add(AppendHealth(nil, &h))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := DecodeHealth(data)
		if err == nil && !bytes.Equal(AppendHealth(nil, &h), data) {
			t.Fatalf("%x is not what %+v encodes to", data, h)
		}
	})
}

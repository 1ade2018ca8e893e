package main

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"testing"

	"google.golang.org/grpc/credentials/insecure"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/gateway"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

// typist answers a question after something has happened.
type typist struct {
	first  func()
	answer io.Reader
}

func (a *typist) Read(p []byte) (int, error) {
	if a.first != nil {
		a.first()
		a.first = nil
	}
	return a.answer.Read(p)
}

// TestRemovesWhatWasShown: the volume that a person was asked about is removed, or
// none: not another one that has its name by then.
func TestRemovesWhatWasShown(t *testing.T) {
	store := meta.NewMem(clock.System{}).Client()
	put := func(name string, id block.VolumeID) {
		t.Helper()
		v := meta.VolumeMeta{V: meta.Format, ID: id, Name: name, SizeBytes: 1 << 30, BlockSize: 512, Replicas: 1, Generation: 1, Settings: 1, State: meta.Creating}
		_, err := store.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(meta.NameKey(name), []byte(id.String()), 0), meta.Put(meta.VolumeKey(id), meta.EncodeVolume(v), 0)}})
		if err != nil {
			t.Fatal(err)
		}
	}
	put("v", block.VolumeID{1})
	l := loop.NewSystem(clock.System{}, loop.DefaultLimits)
	defer l.Stop()
	s := &served{id: "g", store: store, loop: l, gateway: gateway.New(gateway.Options{Loop: l})}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer s.serveAPI(listener, insecure.NewCredentials(), func(error) {})()
	rm := func(answer string, first func()) int {
		var out bytes.Buffer
		c := &console{in: &typist{first, bytes.NewReader([]byte(answer))}, out: &out, err: &out, inTerminal: true}
		code := run(context.Background(), c, os.LookupEnv, []string{"volume", "rm", "v", "--api", listener.Addr().String()})
		t.Log(out.String())
		return code
	}
	swap := func() {
		if _, err := meta.RenameVolume(t.Context(), store, "v", "w"); err != nil {
			t.Fatal(err)
		}
		put("v", block.VolumeID{2})
	}
	if code := rm("v\n", swap); code != kindTable[block.NotFound].exit {
		t.Errorf("exit %d", code)
	}
	for name, id := range map[string]block.VolumeID{"w": {1}, "v": {2}} {
		if v, err := meta.FindVolume(t.Context(), store, name); err != nil || v.ID != id {
			t.Errorf("%s: %v, %v", name, v.ID, err)
		}
	}
	if code := rm("no\n", nil); code == 0 {
		t.Error("removed after a no")
	}
	if code := rm("v\n", nil); code != 0 {
		t.Errorf("exit %d", code)
	}
	if _, err := meta.FindVolume(t.Context(), store, "v"); err == nil {
		t.Error("the volume is still there")
	}
}

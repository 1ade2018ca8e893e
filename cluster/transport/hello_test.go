package transport_test

import (
	"bytes"
	"errors"
	"testing"

	"firn.io/firn/cluster/transport"
	"firn.io/firn/internal/block"
)

func TestClustersAreKeptApart(t *testing.T) {
	id := transport.Identity{Hello: transport.Hello{Cluster: block.ClusterID{1}}}
	if err := id.Check(transport.Hello{Cluster: block.ClusterID{1}, Node: 5}); err != nil {
		t.Error(err)
	}
	if err := id.Check(transport.Hello{Cluster: block.ClusterID{2}}); !errors.Is(err, block.Denied) {
		t.Errorf("another cluster: %v", err)
	}
}

func FuzzHello(f *testing.F) {
	f.Add(transport.AppendHello(nil, transport.Hello{Cluster: block.ClusterID{1, 2}, Node: 3, Session: 4}))
	f.Fuzz(func(t *testing.T, p []byte) {
		h, err := transport.DecodeHello(p)
		if err == nil && !bytes.Equal(transport.AppendHello(nil, h), p) {
			t.Fatalf("%x decodes and encodes to %x", p, transport.AppendHello(nil, h))
		}
	})
}

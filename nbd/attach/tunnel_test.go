package attach

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"testing"
	"time"

	"firn.io/firn/internal/block/blocktest"
	"firn.io/firn/nbd"
	"firn.io/firn/nbd/wire"
)

// certificate signs a certificate for 127.0.0.1, which signs itself.
func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, pool
}

// conn returns the last socket, of which it makes a copy.
func (k *driver) conn(t *testing.T) net.Conn {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	nc, err := net.FileConn(k.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	return nc
}

// ask sends one request as the kernel does and returns what is read.
func ask(t *testing.T, nc net.Conn, r wire.Request, write []byte, read int) []byte {
	t.Helper()
	r.Cookie = 77
	go nc.Write(append(wire.AppendRequest(nil, wire.SimpleReplies, r), write...))
	p := make([]byte, wire.SimpleReplyLen+read)
	if err := nc.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if n, err := io.ReadFull(nc, p); err != nil {
		t.Fatalf("%d bytes of an answer: %v", n, err)
	}
	if reply, err := wire.ParseReply(p[:wire.SimpleReplyLen]); err != nil || reply.Errno != 0 || reply.Cookie != r.Cookie {
		t.Fatalf("%+v, %v", reply, err)
	}
	return p[wire.SimpleReplyLen:]
}

// TestTLS: with TLS the kernel gets a socket on which the protocol is spoken in
// the clear, large requests too; it breaks when the server goes, and is replaced.
func TestTLS(t *testing.T) {
	t.Parallel()
	const size = 1 << 20
	volume := blocktest.New(blocktest.Options{Name: "v", Bytes: size})
	pair, pool := certificate(t)
	options := nbd.Options{TLS: &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}, RequireTLS: true}
	a, stopA := serveWith(t, volume, options)
	b, _ := serveWith(t, volume, options)
	k := &driver{dead: make(chan int)}
	changes := make(chan Status, 64)
	cfg := Config{Export: "v", Gateways: []string{a, b}, Kernel: k, Index: -1, Changed: func(s Status) { changes <- s }}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()

	if _, err := Attach(ctx, cfg); err == nil {
		t.Error("attached in the clear to servers that require TLS")
	}
	cfg.TLS = &tls.Config{RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{pair}}
	if _, err := Attach(ctx, cfg); err == nil {
		t.Error("attached to servers whose certificate nobody known has signed")
	}
	cfg.TLS = &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}}
	d, err := Attach(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if !d.Status().TLS {
		t.Error("the status says nothing of TLS")
	}
	data := make([]byte, size)
	if _, err := rand.Read(data); err != nil {
		t.Fatal(err)
	}
	first := k.conn(t)
	ask(t, first, wire.Request{Command: wire.CmdWrite, Length: size}, data, 0)
	if !bytes.Equal(ask(t, first, wire.Request{Command: wire.CmdRead, Length: size}, nil, size), data) {
		t.Error("read back is not what was written")
	}

	ran := make(chan error, 1)
	go func() { ran <- d.Run(ctx) }()
	stopA()
	for s := range changes {
		if s.Moves == 1 {
			break
		}
	}
	if n, err := first.Read(data[:1]); err == nil {
		t.Errorf("%d bytes on a connection whose server is gone", n)
	}
	second := k.conn(t)
	if !bytes.Equal(ask(t, second, wire.Request{Command: wire.CmdRead, Length: size / 2}, nil, size/2), data[:size/2]) {
		t.Error("the other server has something else")
	}
	cancel()
	<-ran
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if n, err := second.Read(data[:1]); err == nil {
		t.Errorf("%d bytes on a connection after Close", n)
	}
}
